"""Bytes on disks and in buckets that are complete or absent."""
