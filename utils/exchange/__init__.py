"""Distilled sets as the field exchanges them: reading those of other repositories, and publishing those made here."""
