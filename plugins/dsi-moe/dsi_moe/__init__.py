"""dsi policies for mixtures of experts, one file a family; each file is a plugin of its own."""
