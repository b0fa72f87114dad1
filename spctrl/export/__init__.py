"""What an export holds: file names, text files of existing loaders, shards, linked images."""
