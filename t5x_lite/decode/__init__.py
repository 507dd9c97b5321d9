"""Generation over an explicit key-value cache."""
