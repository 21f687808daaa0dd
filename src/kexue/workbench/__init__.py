"""The main job: build a workspace from raw text, query it, report on it."""
