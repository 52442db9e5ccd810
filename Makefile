# A front for scripts/: every target is one script.
.PHONY: help setup demo test bench lint docs prove

help: ## this list
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile
setup: ## make this machine ready (packages, .venv, demo image)
	scripts/setup
demo: ## a VM moves between two hosts, before your eyes
	scripts/demo
test: ## all tests
	scripts/test
bench: ## compare with bare QMP and with virsh
	scripts/bench
lint: ## style, types, import floors
	scripts/lint
docs: ## the reference pages that are made from the code
	scripts/docs
prove: ## the full counts of an issue: make prove ISSUE=A
	scripts/prove $(or $(ISSUE),A)
