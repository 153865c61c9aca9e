"""The two scopes of `dual_scope`: which frames of a video a frame sees, and attention to them."""
