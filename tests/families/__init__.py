"""Tiny random-weight pipelines of every family, each with a loop written by hand. Nothing here imports the project."""

from families import dits, unets, videos

FAMILIES = [*unets.FAMILIES, *dits.FAMILIES, *videos.FAMILIES]
