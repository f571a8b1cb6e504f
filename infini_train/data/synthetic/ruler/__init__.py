"""The 13 tasks of RULER (Hsieh et al., arXiv 2404.06654), laid out as stretches that are generated as they are read."""
