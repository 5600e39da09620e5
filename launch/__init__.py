"""torchx components: how many processes run where. Nothing of the model is imported here."""
