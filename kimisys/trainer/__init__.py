"""The bundled trainer: configuration, master, workers, metrics, report and command line."""
