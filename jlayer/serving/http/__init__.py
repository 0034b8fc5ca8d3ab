"""The server's connections: who may ask, how answers flow, what outlives a connection."""
