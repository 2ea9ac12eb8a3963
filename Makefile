# The commands a newcomer and CI need. `make` alone lists them.
.PHONY: help up build cuda test test-chart test-images test-rdma lint bench simulate proof-split proof-faults proof-model proof-scale proof-rdma clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

up: ## build Baton and run a whole cluster with the demo model on this machine
	cargo run --release --locked --bin baton -- up $(ARGS)

build: ## build the release binary: target/release/baton
	cargo build --release --locked --bin baton

cuda: ## build target/release/baton with the CUDA kernels (installs nvcc if it is absent; needs no GPU)
	CUDA_HOME=$$(kernels/toolkit) cargo build --release --locked --bin baton --features cuda

test: test-chart ## install what tests need and is absent, then run all of them
	PATH="$(CURDIR)/target/tools/bin:$$PATH" cargo test --workspace --locked $(ARGS)

test-chart: ## render the Helm chart and hold it against its golden files, the schemas of Kubernetes and the docs
	bash tests/install
	PATH="$(CURDIR)/target/tools/bin:$$PATH" target/tools/venv/bin/python tests/chart.py $(ARGS)

test-images: ## build the images and run deploy/compose.yaml on an engine of its own (root; installs docker.io if it is absent)
	tests/contained tests/images.py

test-rdma: ## the hand-off through NIXL: its protocol, and a cluster (installs libclang and NIXL's wheels if they are absent)
	bash tests/install nixl
	tests/nixl cargo clippy --locked -p baton --features rdma -- -D warnings
	tests/nixl cargo test --locked -p handoff --features rdma
	tests/nixl cargo test --locked -p tests -- split_over_nixl --nocapture

lint: ## formatting and clippy, warnings denied
	cargo fmt --all --check
	cargo clippy --workspace --all-targets --locked -- -D warnings

bench: build ## measure the demo model on this machine: single-stream decode, 512-token prompts
	bash tests/bench

simulate: ## disturb simulated clusters: SEEDS=1000 or SEEDS=FROM..TO; SEED=17 replays one and tells what happens
	cargo test --locked -p tests --test simulation -- $(if $(SEED),--seed $(SEED),--seeds $(or $(SEEDS),320))

proof-split: ## split equals whole at full size: 200 prompts in every arrangement
	BATON_PROOF=split cargo test --locked -p tests -- split --nocapture

proof-faults: ## kill, stop and cut off every role in every phase under 32 streams; writes tests/proofs/faults-DATE.md and .json
	bash tests/install
	BATON_PROOF=faults PATH="$(CURDIR)/target/tools/bin:$$PATH" cargo test --locked -p tests -- fault_table --nocapture

proof-model: ## model check the hand-off at larger bounds (8 minutes on 16 cores, about 2 GB)
	BATON_PROOF=model cargo test --locked -p handoff --test protocol -- --nocapture --test-threads=1

proof-scale: ## containers under load: decode 2 -> 4 -> 1, prefill 2 -> 0 -> 2, no request lost
	PROFILE=release tests/contained tests/scale.py $(or $(RESULT),target/scale.json)

proof-rdma: ## the hand-off over verbs: protocol, bench and answers in a virtual machine with soft-RoCE (root; a quarter of an hour)
	bash tests/install nixl && bash tests/install guest
	tests/nixl cargo build --release --locked -p baton --features rdma
	tests/nixl cargo test --release --locked -p handoff --features rdma --test wire --no-run
	tests/nixl python3 tests/rdma.py target/release/baton "$$(ls -t target/release/deps/wire-* | grep -v '\.' | head -n 1)" $(or $(RESULT),target/rdma.json)

clean: ## remove what was built
	cargo clean
