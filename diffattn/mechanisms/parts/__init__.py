"""What mechanisms are made of: trained weights, scopes, merging, pooling."""
