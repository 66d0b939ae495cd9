"""Write traces of chosen epochs, and summarise where their time goes."""
