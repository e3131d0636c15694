"""Why a plan is as it is: every figure from solving a changed spec, or changed facts, again."""
