"""STAR on I2VGen-XL."""
