"""The web app: sampling, steering, comparing and exploring in a browser, with Gradio."""
