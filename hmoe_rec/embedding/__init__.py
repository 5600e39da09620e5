"""3. ids -> vectors, once per embedding set."""
