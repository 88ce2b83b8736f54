"""UKDSL section 4.2: semi-supervised feature selection, on impressions and on considerations."""
