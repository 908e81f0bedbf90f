"""End every server and background job this repository started, and nothing else: `make stop`."""

from lab import jobs, results


def main() -> None:
    running = jobs.running()
    for name, job in running.items():
        count = jobs.stop(job)
        print(f"ended {name} ({count} process{'es' if count != 1 else ''})")
    if not running:
        print("nothing of this repository is running")
    results.note("scripts/stop")


if __name__ == "__main__":
    main()
