"""The page to play with: drawing, steering, comparing, training and evaluating in a browser, with Gradio."""
