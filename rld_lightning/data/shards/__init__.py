"""Tar shards in the WebDataset format, on local disks or in object storage."""
