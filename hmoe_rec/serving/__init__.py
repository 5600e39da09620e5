"""10. A finished run -> predictions (and, later, exported models)."""
