"""The command `gsr upscale`: any number of files and folders, one after another.

What is wrong with the command is refused before anything is computed or written. A file that
cannot be upscaled stops no other one: it is named at the end, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, BinaryIO

from gsr.errors import InputError
from gsr.plan import (
    PIPE,
    Job,
    Page,
    Plan,
    check_outputs,
    check_sizes,
    find_jobs,
    limit,
    makes_folder,
    plan,
)


def run(args: argparse.Namespace) -> None:
    """Upscale what the arguments of `gsr upscale` name. Exits with 1 if some files failed."""
    from gsr.device import select_device, set_threads

    set_threads(args.threads)
    jobs = find_jobs(args)
    todo = [job for job in jobs if not (args.skip_existing and job.output.exists())]
    check_outputs(args, todo)
    batch = Batch(args, select_device(args.device), several=len(jobs) > 1)
    if batch.several and args.model is not None and not args.dry_run:
        batch.model(args.model)  # for all of them: not the fault of any file
    batch.run(todo)
    if batch.several and not args.quiet:
        there = len(jobs) - len(todo) + batch.skipped
        done = "would be upscaled" if args.dry_run else "upscaled"
        count = len(todo) - batch.skipped
        text = f"{count - len(batch.failures)} of {count} images {done}"
        print(text + (f", {there} there already" if there else ""), flush=True)
    if batch.failures:
        print(f"gsr: {len(batch.failures)} of {len(todo)} images failed:", file=sys.stderr)
        for failure in batch.failures:
            print(f"  {failure}", file=sys.stderr)
        sys.exit(1)


REACH = 8  # LR pixels around one that a head and the bicubic upsampling look at, and some more


class Batch:
    """Upscales files one by one; `failures` are sentences, `skipped` counts what others did."""

    def __init__(self, args: argparse.Namespace, device: Any, several: bool):
        self.args, self.device, self.several = args, device, several
        self.models: dict[str, Any] = {}
        self.failures: list[str] = []
        self.skipped = 0
        self.bar: Any = None

    def run(self, jobs: list[Job]) -> None:
        """Upscale the files. Raises InputError only where a single one was asked for."""
        from gsr.inference.strips import progress_bar

        planned = [done for job in jobs if (done := self._try(self._plan, job)) is not None]
        if self.args.dry_run:
            return
        with progress_bar(not self.args.quiet and sys.stderr.isatty()) as self.bar:
            for number, (job, found, file) in enumerate(planned, 1):
                if self.bar is not None and self.several:
                    if number == 1:  # the time that is left is that of all files
                        self.bar.total = sum(self._work(found) for _, found, _ in planned)
                    self.bar.set_description_str(f"{number} of {len(planned)}")
                self._try(self._upscale, job, found, file)

    def _try(self, step: Any, job: Job, *arguments: Any) -> Any:
        """Take a step of a job; what goes wrong is noted where there are several files."""
        try:
            return step(job, *arguments)
        except InputError as error:
            text = str(error)
            if job.name not in text and str(job.output) not in text:
                text = f"{job.name}: {text}"
            if not self.several:
                raise InputError(text) from None
            self.failures.append(text)
            self._say(f"gsr: error: {text}", sys.stderr)
            return None

    def _say(self, text: str, stream: Any = None) -> None:
        """Print a line, above the bar if there is one."""
        with nullcontext() if self.bar is None else self.bar.external_write_mode():
            print(text, file=stream, flush=True)

    def model(self, name: str) -> Any:
        """Return a model by its name or path, loaded once."""
        from gsr.models.checkpoint import load

        if name not in self.models:
            self.models[name] = load(name).to(self.device)
        return self.models[name]

    def _work(self, found: Plan, page: Page | None = None) -> float:
        """About how much there is to do for a file, or one page of it, in the unit of the bar."""
        from gsr.inference.strips import work

        pages = found.pages if page is None else [page]
        return sum(work(self.model(found.model), p.shape, p.size) for p in pages)

    def _plan(self, job: Job) -> tuple[Job, Plan, BinaryIO | None]:
        """Read a file's header; what came through a pipe is kept, as it cannot be read again."""
        from gsr.io.image import decoding, open_file

        file = open_file(job.source)
        try:
            with decoding(job.name, limit(self.args)), silent():
                found = plan(file, job, self.args)
        finally:
            kept = file if not os.path.isfile(job.source) else None
            if kept is None:
                file.close()
        check_sizes(self.args, job, found)
        if self.args.dry_run and not self.args.quiet:
            print(f"{job.name} -> {job.output}: {_sizes(found)}{found.why}")
        return job, found, kept

    def _upscale(self, job: Job, found: Plan, file: BinaryIO | None) -> None:
        """Upscale one file."""
        from gsr.io.image import being_written, open_file
        from gsr.io.writer import pages_writer

        if self.several and not self.args.overwrite and job.output.exists():
            # Since the beginning: by another run on this folder.
            if not self.args.skip_existing:
                raise InputError(f"{job.output} exists by now; give --overwrite to replace it")
            self.skipped += 1
            return
        if self.args.skip_existing and being_written(job.output):
            self.skipped += 1
            return
        self.model(found.model)
        start = time.perf_counter()
        options = {"quality": self.args.quality, "subsampling": self.args.chroma}
        with (
            open_file(job.source) if file is None else file as opened,
            _destination(job.output, self.args) as path,
            pages_writer(
                path, 8 * found.pixels, options, animated=found.animated, plays=found.plays
            ) as next_page,
        ):  # fmt: skip
            for page in found.pages:
                if len(found.pages) > 1 and self.bar is not None and not self.several:
                    self.bar.set_description_str(f"{page.number + 1} of {len(found.pages)}")
                self._page(job, opened, page, found, next_page, path)
        if not self.args.quiet and str(job.output) != PIPE:
            seconds = time.perf_counter() - start
            self._say(f"{job.output}: {_sizes(found)} in {seconds:.1f} s{found.why}")
        if self.args.compare:
            self._compare(job)

    def _page(
        self, job: Job, file: BinaryIO, page: Page, found: Plan, next_page: Any, path: Path
    ) -> None:
        """Decode and upscale a page."""
        from gsr.inference.upscale import upscale_page
        from gsr.io.image import decoding
        from gsr.io.source import Metadata, read_source, wrap_around

        args = self.args
        with decoding(job.name, limit(args)), silent():
            source = read_source(file, page.number)
        if args.strip_metadata:
            source.meta = Metadata(source.meta.icc)  # without its profile it has other colours
        if self.bar is not None and self.several:
            self.bar.total -= self._work(found, page)  # which comes back, counted exactly
        model = self.model(found.model)
        scale, size, crop = args.scale, None if args.scale else page.size, page.crop
        if args.wrap:
            scale, crop = None, page.size
            size = wrap_around(source, page.size, model.halo + REACH)
        upscale_page(
            next_page, path, source, scale, size, model, args.max_memory, args.precision,
            crop=crop, bits=args.bits, animated=found.animated, bar=self.bar,
        )  # fmt: skip

    def _compare(self, job: Job) -> None:
        from gsr.io.image import open_image, save_image
        from gsr.sheet import side_by_side

        images = open_image(job.source), open_image(job.output)
        save_image(self.args.compare, side_by_side(*images))
        if not self.args.quiet:
            self._say(f"{self.args.compare}: bicubic left, gsr right")


def _sizes(found: Plan) -> str:
    """Say the size of the result, and how many pages or frames it has."""
    height, width = found.pages[0].crop or found.pages[0].size
    count, what = len(found.pages), "frames" if found.animated else "pages"
    return f"{width} x {height}" + (f", {count} {what}" if count > 1 else "")


@contextmanager
def silent() -> Generator[None]:
    """Drop what C libraries print: libtiff has lines of its own on stderr for damaged files."""
    try:
        kept = os.dup(2)
    except OSError:  # there is no stderr
        yield
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    os.close(null)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextmanager
def _destination(output: Path, args: argparse.Namespace) -> Generator[Path]:
    """Yield the file to write; for standard output one that is copied there at the end."""
    from gsr.io.image import remove_left_over
    from gsr.io.paths import make_folder

    if str(output) == PIPE:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, f"out.{args.format or 'png'}")
            yield path
            with open(path, "rb") as file:
                shutil.copyfileobj(file, sys.stdout.buffer)
            sys.stdout.buffer.flush()
        return
    if makes_folder(args):
        make_folder(output.parent)
    remove_left_over(output.parent)
    yield output
