@echo off
rem From a fresh clone to a trained model, in two steps: environment, then one training command.
rem train_quick_start.sh does the same, step for step, on Linux and macOS.
rem A path is quoted wherever it is used, and never passed to call, which expands %x% in it again.
setlocal EnableExtensions DisableDelayedExpansion
for %%i in ("%~0") do set "root=%%~dpi"
if not exist "%root%backend\train_model.py" set "root=%~dp0"
set "venv_python=%root%.venv\Scripts\python.exe"
set "PYTHONPATH="
set "PYTHONHOME="
set "PIP_USER=0"

set "mode=%~1"
if "%mode%"=="" goto sample
if "%mode%"=="-h" goto help
if "%mode%"=="--help" goto help
if "%mode%"=="help" goto help
if "%mode%"=="setup" goto setup_only
if "%mode%"=="food101" goto food101
if "%mode:~0,1%"=="-" goto flags
call :usage 1>&2
exit /b 2

:help
call :usage
if exist "%venv_python%" "%venv_python%" "%root%backend\train_model.py" --help
exit /b %errorlevel%

:setup_only
call :setup
if errorlevel 1 exit /b 1
if "%~2"=="" exit /b 0
set "list=%~2"
goto install

:food101
call :setup
if errorlevel 1 exit /b 1
rem As typed, without quotes around it all: the quotes of single arguments keep protecting & and |.
set rest=%*
"%venv_python%" "%root%backend\train_model.py" --epochs 20 --model_name mobilenet_v2 %rest:*food101=%
exit /b %errorlevel%

:sample
call :setup
if errorlevel 1 exit /b 1
"%venv_python%" "%root%backend\train_model.py" --sample --model_name efficientnet_lite0 --epochs 8
if %errorlevel% neq 0 exit /b %errorlevel%
call :show_next
exit /b %errorlevel%

:flags
call :setup
if errorlevel 1 exit /b 1
"%venv_python%" "%root%backend\train_model.py" --sample --model_name efficientnet_lite0 --epochs 8 %*
exit /b %errorlevel%

:usage
echo train_quick_start.bat               train on drawn sample plates: minutes, nothing to download
echo train_quick_start.bat food101       train MobileNetV2 on Food-101 for 20 epochs (5 GB download)
echo train_quick_start.bat setup [FILE]  only make .venv and install (also what FILE lists)
echo.
echo Any flag of backend\train_model.py may follow the first two, for example --epochs 3.
exit /b 0

:setup
call :make_environment
if errorlevel 1 exit /b 1
set "list=backend\requirements.txt"
goto install

:suits
"%base%" %flag% -c "import sys; sys.exit(sys.version_info < (3, 10) or sys.maxsize < 2**32)" >nul 2>&1
if %errorlevel% neq 0 exit /b 1
exit /b 0

:find_python
set "flag="
if defined PYTHON goto own_python
set "base=py"
for %%v in (-3.14 -3.13 -3.12 -3.11 -3.10 -3) do (
  set "flag=%%v"
  call :suits
  if not errorlevel 1 exit /b 0
)
set "base=python"
set "flag="
goto suits
:own_python
set "base=%PYTHON:"=%"
goto suits

:make_environment
if exist "%root%.venv\unfinished" rmdir /s /q "%root%.venv"
if not exist "%root%.venv" goto new_environment
set "base=%venv_python%"
set "flag="
call :suits
if errorlevel 1 goto broken_environment
"%venv_python%" -c "import pip"
if %errorlevel% equ 0 exit /b 0
:broken_environment
echo train_quick_start: "%root%.venv" has no working 64-bit Python 3.10 or newer with pip; delete it and try again 1>&2
exit /b 1

:new_environment
call :find_python
if errorlevel 1 goto no_python
"%base%" %flag% -c "import sys; sys.exit(sys.version_info < (3, 15))"
if %errorlevel% equ 0 echo This Python is newer than 3.14; if installing fails, set PYTHON to the path of an older one 1>&2
echo making .venv
mkdir "%root%.venv"
if not exist "%root%.venv" exit /b 1
type nul >"%root%.venv\unfinished"
"%base%" %flag% -m venv "%root%.venv"
if %errorlevel% neq 0 goto no_environment
del "%root%.venv\unfinished"
exit /b 0
:no_python
echo train_quick_start: a 64-bit Python 3.10 to 3.14 is needed; get one from python.org, with its launcher py (in an unusual place: set PYTHON to its path) 1>&2
exit /b 1
:no_environment
rmdir /s /q "%root%.venv"
echo train_quick_start: the environment could not be made, see above; reinstall Python from python.org with pip 1>&2
exit /b 1

:install
set "list=%list:/=\%"
set "stamp=%root%.venv\installed-%list:\=-%"
fc /b "%root%%list%" "%stamp%" >nul 2>&1
if not errorlevel 1 exit /b 0
if not exist "%root%%list%" goto no_list
"%venv_python%" -c "import shutil, sys; sys.exit(shutil.disk_usage(sys.prefix).free < 4 * 10**9)"
if %errorlevel% neq 0 echo less than 4 GB free: the packages take about 3 GB 1>&2
echo installing %list% (several minutes the first time)
"%venv_python%" -m pip install --disable-pip-version-check -r "%root%%list%"
if %errorlevel% neq 0 goto not_installed
copy /y "%root%%list%" "%stamp%" >nul
exit /b 0
:no_list
echo train_quick_start: there is no "%list%" in "%root%" 1>&2
exit /b 1
:not_installed
echo train_quick_start: installing failed, see above. No connection: pip needs its package index once. No space: free some. No matching version: PyTorch has packages for 64-bit Python 3.10 to 3.14. Then run this again; what is installed is kept 1>&2
exit /b 1

:show_next
set "sample=%root%data\sample\food-101"
for /f "usebackq delims=" %%l in ("%sample%\meta\test.txt") do (
  set "picture=%%l"
  goto ask
)
:ask
echo.
echo What the model sees in one test picture:
"%venv_python%" "%root%backend\train_model.py" --predict "%sample%\images\%picture%.jpg"
if %errorlevel% neq 0 exit /b %errorlevel%
echo.
echo Made: the model and its report.html in ml-models\, the plates in data\sample\, the run in
echo checkpoints\ and mlflow.db. The plates are drawn: the model shows that everything works, and knows
echo nothing about your own food. Next:
echo   train_quick_start.bat food101
echo   .venv\Scripts\mlflow ui --backend-store-uri sqlite:///mlflow.db
echo   cd backend ^&^& ..\.venv\Scripts\uvicorn app.main:app
echo These train on Food-101 (101 real dishes), compare runs on http://127.0.0.1:5000, and let you try
echo the model on http://127.0.0.1:8000.
exit /b 0
