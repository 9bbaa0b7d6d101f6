"""Everything needed to train the small bundled model: style filters, prompts, data, losses and loops."""
