"""How the numbers of a tensor are stored as bytes. Standard library only."""
