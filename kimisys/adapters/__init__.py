"""Everything that imports a foreign system, one package for each."""
