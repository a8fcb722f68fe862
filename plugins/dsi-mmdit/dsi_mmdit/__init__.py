"""dsi policies for diffusion transformers over two streams, text and image; each of `sd3` and `flux` is a plugin.

Their containers are in `containers`, which is imported with the first layer that one of them stands in for.
"""
