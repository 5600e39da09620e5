"""Real training steps under several sharding plans, in turns; what this machine takes for the parts of a step."""
