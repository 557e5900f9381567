"""The management command of the app, where Django looks for it."""
