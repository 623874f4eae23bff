"""The functions by which threads share one kernel: claim a chunk, run it, until none is left."""

from __future__ import annotations

from luthier.codegen.llvm.printer import KernelPrinter, quote
from luthier.codegen.llvm.types import reg_type
from luthier.ir.loop import Buffer
from luthier.passes.loop.check_bounds import is_checked


class SharePrinter(KernelPrinter):
    """The function that hands the iterations of one kernel to the threads."""

    def share(self, symbol: str) -> str:
        params, args = ["ptr %st"], []
        for k, p in enumerate(self.f.params):
            t = "ptr" if isinstance(p, Buffer) else reg_type(p.dtype)
            params.append(f"{t} %p{k}")
            args.append(f"{t} %p{k}, ")
        params += ["i64 %total", "i64 %grain"]
        given = "".join(args)
        checked = is_checked(self.f)
        call, ctx = (f"call {'i32' if checked else 'void'} @{quote(symbol)}", ", ptr %ctx" if checked else "")
        if checked:
            self.lines.append("%ctx = load ptr, ptr %st")
        self.lines += [
            "%any = icmp sgt i64 %total, 0",
            "br i1 %any, label %some, label %done",
            "some:\n",
            "%np = getelementptr %state, ptr %st, i32 0, i32 3",
            "%n = load i64, ptr %np",
            "%one = icmp eq i64 %n, 1",
            "br i1 %one, label %alone, label %shared",
            "alone:\n",
            f"{call}({given}i64 0, i64 %total{ctx})",
            "ret void",
            "shared:\n",
            "%chunk = call i64 @lt.chunk(ptr %st, i64 %total, i64 %grain)",
            "call void @lt.begin_loop(ptr %st, i64 %total, i64 %chunk)",
            "br label %next",
            "next:\n",
            "%mine = phi i32 [ 0, %shared ], [ %mine1, %work ]",
            "%s = call i64 @lt.claim(ptr %st, i64 0, i64 %total, i64 %chunk)",
            "%end = icmp slt i64 %s, 0",
            "br i1 %end, label %last, label %work",
            "work:\n",
            "%e0 = add i64 %s, %chunk",
            "%e = call i64 @llvm.smin.i64(i64 %e0, i64 %total)",
            f"{call}({given}i64 %s, i64 %e{ctx})",
            "%mine1 = add i32 %mine, 1",
            "br label %next",
            "last:\n",
            "call void @lt.finish(ptr %st, i32 %mine)",
            "ret void",
            "done:\n",
            "ret void",
        ]
        self.declare("llvm.smin.i64", "i64 @(i64, i64)")
        return definition(self, f"internal void @{quote(symbol + '.share')}({', '.join(params)})")


def definition(p: KernelPrinter, head: str) -> str:
    lines = [f"  {x}\n" if not x.endswith(":\n") else x for x in (*p.entry, *p.lines)]
    return f"define {head} #0 {{\nentry:\n{''.join(lines)}}}\n"
