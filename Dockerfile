# The server, without PyTorch. Build: docker build -t convlens-serve .
# Run: docker run --rm -p 8000:8000 -e CONVLENS_TOKEN=choose-one -v "$PWD/mnist-1.onnx:/mnist-1.onnx:ro" convlens-serve /mnist-1.onnx
FROM python:3.13-slim
COPY . /convlens
# what serving takes of the dependencies in pyproject.toml; convlens itself comes without them, for PyTorch is among them
RUN pip install --no-cache-dir --constraint /convlens/constraints.txt \
        fastapi numpy onnx onnxruntime pillow prometheus-client python-multipart rich safetensors typer uvicorn \
    && pip install --no-cache-dir --no-deps /convlens \
    && rm -rf /convlens
ENV ORT_DISABLE_TELEMETRY=1
USER nobody
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:8000/readyz')"]
ENTRYPOINT ["convlens", "serve", "--host", "0.0.0.0"]
CMD ["mnist"]
