"""The command: a driving video read, a portrait animated and resumed."""
