"""Benchmarks: questions with known answers, how they are asked, read, counted and reported."""
