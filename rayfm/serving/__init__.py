"""Ray Serve applications, and labelling through them."""
