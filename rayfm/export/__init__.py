"""A trained model as a served one: unsharded, calibrated, checked."""
