"""The page at / of the server: one HTML file, and the headers it is sent with."""
