# Quorum on CPUs. EXTRAS names optional dependencies of pyproject.toml, TORCH where torch comes from.
#
#   docker build -t quorum .
#   docker run --rm --init quorum                              # the bundled rows
#   docker run --rm --init -v "$PWD":/data quorum engine.sample \
#       --model /data/model --data /data/rows.jsonl --out /data/verdicts.jsonl
#
# What it writes to /data belongs to user 1000. Mount a volume at /home/quorum/.cache to keep the C++,
# which is built for the machine when it is first used.
FROM python:3.12-slim

RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ \
    && rm -rf /var/lib/apt/lists/* \
    && useradd --create-home --uid 1000 quorum

ARG TORCH=https://download.pytorch.org/whl/cpu
ARG EXTRAS=""
WORKDIR /quorum

# What is needed from elsewhere first: it changes more rarely than the code.
COPY pyproject.toml constraints.txt ./
RUN python -c 'import sys, tomllib; \
        project = tomllib.load(open("pyproject.toml", "rb"))["project"]; \
        extras = [name for name in sys.argv[1].split(",") if name]; \
        needed = [project["optional-dependencies"][name] for name in extras]; \
        print(*project["dependencies"], *sum(needed, []), sep="\n")' "$EXTRAS" > /tmp/needed.txt \
    && pip install --no-cache-dir --extra-index-url "$TORCH" -c constraints.txt -r /tmp/needed.txt
COPY . .
RUN pip install --no-cache-dir --no-deps .

USER quorum
WORKDIR /home/quorum
ENTRYPOINT ["python", "-m"]
CMD ["engine.sample"]
