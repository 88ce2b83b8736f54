"""What the papers prove or simulate about bias and staleness, as numerical experiments beside their closed forms."""
