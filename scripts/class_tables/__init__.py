"""What the tables of model classes and pipelines are made of."""
