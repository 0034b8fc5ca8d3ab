"""Generation of tokens: the device, compiled programs, and the runs that share them."""
