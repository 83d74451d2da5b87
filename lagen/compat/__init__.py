"""Drop-in faces of other libraries' operators, so that a model changes over by one import."""
