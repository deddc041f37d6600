"""The engine over HTTP: ``app`` has the routes, ``guard`` what stands before them, ``server`` runs both."""
