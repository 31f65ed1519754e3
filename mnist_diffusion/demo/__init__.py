"""The web app: sampling, steering, comparing, exploring and training in a browser, with Gradio."""
