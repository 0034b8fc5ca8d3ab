"""How weights and side files change between source and target: cast, quantized."""
