"""How numbers lie in bytes. Standard library only."""
