FROM vllm/vllm-openai
COPY dist/*.whl /tmp/
RUN pip install --no-cache-dir /tmp/*.whl && rm /tmp/*.whl
ENV XDG_RUNTIME_DIR=/run/flexkv
