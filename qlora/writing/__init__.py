"""Rows written from documents: drafts, checks, selection, review."""
