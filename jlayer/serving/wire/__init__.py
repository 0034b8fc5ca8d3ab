"""Bodies of requests → orders, and what came of them → JSON: pure functions, no connections."""
