"""Results for people and for machines: terminal tables and JSON lines."""
