"""Command line tools that turn text into shards of token ids."""
