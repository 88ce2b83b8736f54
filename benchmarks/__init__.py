"""Speed as ratios in one run: each line measures two things side by side, so that the machine cancels out."""
